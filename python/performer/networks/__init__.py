"""Import paths that code written for earlier Performer packages uses."""
