import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry


@pytest.fixture
def restored_backend():
    """For tests that set an attention backend: diffusers keeps the last one as the default of all models."""
    backend, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(backend)
