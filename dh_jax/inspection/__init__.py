"""Looking at data: what a config yields, where a document is, what a run's batch held."""
