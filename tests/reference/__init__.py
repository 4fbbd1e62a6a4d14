"""Plain-PyTorch references for the property tests; nothing here knows or imports replfx."""

from tests.reference.blocks import FAMILIES, Family, Options
from tests.reference.model import MaskedStack, Stack, build, reference_forward

__all__ = ["FAMILIES", "Family", "MaskedStack", "Options", "Stack", "build", "reference_forward"]
