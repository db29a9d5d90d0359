"""How sections of the configuration are declared, checked and described; words that other tools use."""
