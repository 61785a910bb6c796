"""Row map functions, by how their rows look: single_turn, dialogue, msagent."""
