"""What tests of commands in processes of their own share."""

from tests.train.conftest import environment as environment
