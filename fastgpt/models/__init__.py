"""The GPT that fastgpt trains."""
