"""What an assistant's text means: answer, reasoning, calls of tools. Pure functions of the text."""
