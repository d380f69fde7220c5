"""`python -m llmslim` is the command `llmslim`."""

from llmslim.cli.main import main

if __name__ == "__main__":
    main()
