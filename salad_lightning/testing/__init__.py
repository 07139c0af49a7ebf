"""Contract tests and small real data for the tests of this package and of plugins."""
