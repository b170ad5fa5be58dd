"""Drives one run, and waits for no last checkpoint once it was asked to stop."""

from elastic.runtime import driver
from tests.integration import drive

if __name__ == "__main__":
    driver.STOP_LIMIT_S = 0.0
    drive.main()
