"""ACT in LeRobot's layout: pictures and state to a chunk of actions, without words."""
