"""Text and conversations -> tokens: vocabularies, offsets, chat templates and their masks."""
