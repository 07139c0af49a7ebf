"""The subcommands of ``salad-lightning`` that have no package of their own."""
