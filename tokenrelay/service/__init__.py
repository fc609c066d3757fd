"""The service around the model: sub-folders are processes, the files here are what the processes share."""
