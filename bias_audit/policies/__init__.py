"""What an audit must show, as people write it down: read, checked, drafted."""
