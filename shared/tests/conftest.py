"""Settings of Hypothesis for all tests of the shared library."""

from hypothesis import settings

# The first example pays for imports, and a busy machine is no failure.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
