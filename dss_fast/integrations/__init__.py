"""dss_fast inside other people's stacks. Each module imports its stack and nothing else does."""
