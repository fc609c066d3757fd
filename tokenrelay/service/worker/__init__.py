"""The model worker's process: claims requests, runs the engine, publishes its tokens."""
