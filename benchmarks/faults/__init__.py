"""What happens to a run when a process is killed, a disk fills up or a file is damaged: 38 faults."""
