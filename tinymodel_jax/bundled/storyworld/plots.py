"""The plots and roles of the story world, by name; what happens in a plot is in the grammar file of its name.

Rely on: these names are parts of concepts' names, and their order is part of what a seed means.
"""

PLOTS = {
    "lost": "something dear is lost and found",
    "broken": "something is broken and mended",
    "stuck": "a small animal is stuck and set free",
    "sharing": "something good is kept, then shared",
    "fear": "a noise at night turns out to be a small animal",
    "astray": "the two lose their way and are led home",
    "skill": "something is too hard, then learned",
    "gift": "a birthday gift goes wrong, and one made by hand is better",
    "storm": "bad weather spoils a plan, and a shelter saves the day",
    "forbidden": "a rule is broken and the truth told",
    "newcomer": "a stranger becomes a friend",
    "planting": "a seed needs patience",
    "race": "a race is given up to help",
}

ROLES = {"H": "hero", "F": "friend", "A": "helper"}
"""Letter of a role in the grammar -> the role."""
OTHER = "X"
"""Letter of anyone else who speaks or listens."""
