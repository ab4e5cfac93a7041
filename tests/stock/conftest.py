"""The fork server and the fault library of tests/kill serve here too."""

from kill.conftest import fault_library, fork_server, faults  # noqa: F401
