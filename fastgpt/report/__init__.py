"""Look at runs: `fastgpt report` writes a page that compares them, `fastgpt watch` follows one in the terminal."""
