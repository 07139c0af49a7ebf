"""Stage II's choice of text: embed, cluster, probe, score and draw (arXiv 2510.13632, section on active selection)."""
