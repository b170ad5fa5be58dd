"""Has pytest explain the assertions of the suites that tests inherit."""

import pytest

pytest.register_assert_rewrite("tests.contract.suite", "tests.contract.s3_suite")
