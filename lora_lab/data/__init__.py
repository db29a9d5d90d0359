"""From files to token ids and exact loss masks: sources -> formats -> encode -> collate."""
