"""The fork server and the fault library of tests/kill serve here too."""

from kill.conftest import fault_library, faults, fork_server

__all__ = ["fault_library", "faults", "fork_server"]
