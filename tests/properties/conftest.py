"""How the property tests draw: the same few examples each time, or many new ones.

``pytest tests/properties --hypothesis-profile thorough`` draws more, and others each time.
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
