"""The GPT model that fastgpt trains."""
