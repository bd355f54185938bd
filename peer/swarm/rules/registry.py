"""The rules that a plan can name."""

from hivegrpo.peer.swarm.rules.base import Rule
from hivegrpo.peer.swarm.rules.centered_clip import CenteredClip
from hivegrpo.peer.swarm.rules.trimmed_mean import TrimmedMean
from hivegrpo.peer.swarm.rules.weighted import Clip, Mean
from hivegrpo.protocol.errors import ConfigError

RULES: dict[str, Rule] = {rule.name: rule for rule in (Mean(), Clip(), TrimmedMean(), CenteredClip())}


def get_rule(name: str) -> Rule:
    """The rule of that name; ConfigError if there is none."""
    if name not in RULES:
        raise ConfigError(f"There is no aggregation rule {name!r}.", f"Choose one of: {', '.join(sorted(RULES))}.")
    return RULES[name]
