"""The steps of `prepare`: piecework, what is dropped and why, and the writing of shards."""
