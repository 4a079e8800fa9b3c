"""Records from anywhere: files by format, object stores, hubs; in pieces, with patience."""
