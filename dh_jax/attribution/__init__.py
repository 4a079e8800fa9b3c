"""`dh influence`: which documents helped or harmed which probes, from a config to a report."""
