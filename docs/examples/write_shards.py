"""Write pairs of your own as shards, and look at what came out."""

from PIL import Image

from realign_lightning.data import ShardWriter, read_index
from realign_lightning.types import PreferenceSample, SampleError

street, crossing = Image.new("RGB", (336, 336), "gray"), Image.new("RGB", (336, 336), "black")
pairs = [
    PreferenceSample(
        key="000017",
        image=street,
        retrieved=crossing,
        prompt="What is in the picture?",
        chosen="A bus at a traffic light.",
        rejected="A truck at a traffic light.",
        provenance={"image_id": "street", "retrieved_id": "crossing", "retrieval_rank": 0},
    ),
    PreferenceSample("000018", street, crossing, "What is in the picture?", "A bus.", "A bus."),
]

with ShardWriter("pairs/train", samples_per_shard=500, built_with={"source": "our annotators"}) as writer:
    for pair in pairs:
        try:
            writer.write(pair)
        except SampleError as error:
            print(f"left out {pair.key}: {error}")

for shard in read_index("pairs/train").shards:
    print(f"{shard.name}: {shard.samples} samples")
