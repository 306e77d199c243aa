"""Only the metrics: POPE and CHAIR on answers that any model gave."""

from realign_lightning.metrics import ground_truth
from realign_lightning.metrics.functional import chair, pope

answers = ["Yes, there is a dog.", "There is no cat.", "A bus is parked outside."]
for name, value in pope(answers, ["yes", "no", "no"]).items():
    print(f"POPE {name} {value.item():.2f}")

captions = ["A dog sleeps beside a cat on the sofa.", "Two buses wait at a traffic light."]
targets = [
    ground_truth(["dog"], ["A puppy lies on a couch."]),
    ground_truth(["bus", "traffic light"], []),
]
for name, value in chair(captions, targets).items():
    print(f"CHAIR {name} {value.item():.2f}")
