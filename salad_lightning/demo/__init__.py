"""The miniature world: a text world, a tiny teacher, a spoken corpus, and the report."""
