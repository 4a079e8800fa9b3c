"""What kinds of documents become rows."""
