"""The parts of the stage ``matrix``: what is run, on what, and what is made of it."""
