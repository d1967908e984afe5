"""Generation of completions: prefill, decoding with early exits, and sampling."""

from jexit.config import EngineSize
from jexit.rollout.arrivals import Arrivals
from jexit.rollout.engine import Decodable, Decoding, rollout
from jexit.rollout.requests import Request
from jexit.rollout.results import Grown, Rollouts
from jexit.rollout.texts import generate, stream
