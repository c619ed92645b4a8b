"""What the rest of fastgpt is built on: backend selection, facts about the machine, settings, errors."""
