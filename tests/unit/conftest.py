import pytest
import torch
from transformers import AutoTokenizer, logging

logging.set_verbosity_error()  # as the scripts do
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained("tiny/policy")
