"""Profiles of the property tests: few fixed examples, or many new ones.

``pytest tests/properties --hypothesis-profile thorough`` generates more examples, which
differ each time.
"""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "few",
    derandomize=True,
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough", settings.get_profile("few"), derandomize=False, max_examples=2000
)
settings.load_profile("few")
