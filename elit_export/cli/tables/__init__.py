"""Facts → tables for people. Nothing here prints."""
