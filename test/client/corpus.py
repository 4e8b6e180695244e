"""A corpus small enough to read, whose answers share meaning with the questions."""

QUERIES = {
    "q-bread": "How does yeast make bread dough rise?",
    "q-moon": "What causes the phases of the moon?",
    "q-heart": "How does the heart pump blood through the body?",
    "q-volcano": "Why do volcanoes erupt?",
    "q-bees": "How do bees make honey?",
    "q-bridge": "What holds up a suspension bridge?",
    "q-vote": "How are votes counted in an election?",
    "q-guitar": "How does a guitar string make a sound?",
}
DOCUMENTS = {
    "bread": "Yeast in bread dough eats sugar and gives off gas, and the bubbles of gas make the dough rise.",
    "moon": "The phases of the moon come from the changing part of its sunlit half that we see from the earth.",
    "heart": "The heart is a muscle that pumps blood through the body; its valves keep the blood from flowing back.",
    "volcano": "Volcanoes erupt when hot gas and melted rock under pressure rise through cracks in the earth.",
    "bees": "Bees collect nectar from flowers and dry it in the hive until it becomes honey.",
    "bridge": "The deck of a suspension bridge hangs from cables, which are held up by tall towers.",
    "vote": "After an election the votes are counted by officials, and observers watch the counting.",
    "guitar": "A guitar string makes a sound when it is plucked and vibrates, and the wooden body makes it louder.",
    "train": "The train leaves the central station every hour and arrives in the evening.",
    "cheese": "Cheese is made from milk, and some kinds ripen for years in a cellar.",
}
RELEVANT = {f"q-{name}": {name} for name in DOCUMENTS if f"q-{name}" in QUERIES}

# Two texts and how similar they are, from 0 to 1.
SIMILAR_PAIRS = [
    ("A man is playing a guitar.", "A man plays the guitar.", 1.0),
    ("The cat sleeps on the sofa.", "A cat is sleeping on a couch.", 0.95),
    ("It will rain tomorrow.", "Rain is expected tomorrow.", 0.9),
    ("A woman is cooking dinner.", "A woman prepares a meal.", 0.8),
    ("Children play football in the park.", "Kids are playing a game outside.", 0.7),
    ("A dog runs on the beach.", "A horse runs over a field.", 0.35),
    ("The bank raised its interest rates.", "A child paints a picture of a house.", 0.0),
    ("The train was late this morning.", "Honey is made by bees.", 0.0),
    ("He repaired the broken window.", "The senate voted on the new law.", 0.0),
]
