"""The toy world: films of moving shapes, a simulated subject, and tiny networks of the real classes."""
