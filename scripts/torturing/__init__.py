"""What make torture does to tiny studies: kills, full disks, a clock that jumps, damaged files.

Everything happens to the real program, in a copy of the project below a temporary folder; results of the user are never
touched. Each module holds one kind of harm and gives its cases; `arena` holds what they share.
"""
