import pytest

from tests.scripts.benching.peers import MODEL


@pytest.fixture
def peer_file(tmp_path):
    """A model of the user's own, with nanoGPT's interface, in a file of its own."""
    path = tmp_path / "peer/model.py"
    path.parent.mkdir()
    path.write_text(MODEL)
    return path
