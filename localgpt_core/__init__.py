"""localgpt: a character GPT whose linear layers choose how they learn."""
