from ldm.data.coco_stuff import DETECTION_CLASSES
from ldm.data.object_classes import TopClasses

__all__ = ["open_images_unify_categories_for_coco", "top_300_classes_plus_coco_compatibility"]

# Names of OpenImages' classes that differ from those of COCO's classes with the same meaning.
_OTHER_NAMES = {
    "cell phone": "Mobile phone",
    "couch": "Couch",
    "cow": "Cattle",
    "cup": "Coffee cup",
    "dining table": "Kitchen & dining room table",
    "donut": "Doughnut",
    "frisbee": "Flying disc",
    "hair drier": "Hair dryer",
    "keyboard": "Computer keyboard",
    "microwave": "Microwave oven",
    "mouse": "Computer mouse",
    "potted plant": "Houseplant",
    "remote": "Remote control",
    "skis": "Ski",
    "sports ball": "Ball",
    "tv": "Television",
}

# The 300 most frequent classes in the training boxes, and those that COCO has. The boxes of OpenImages decide.
top_300_classes_plus_coco_compatibility = TopClasses(
    300, tuple(_OTHER_NAMES.get(name, name) for name in DETECTION_CLASSES)
)

# Classes of OpenImages that COCO does not distinguish → the class that includes them.
open_images_unify_categories_for_coco = {
    "/m/03bt1vf": "/m/01g317",  # Woman → Person
    "/m/04yx4": "/m/01g317",  # Man → Person
    "/m/05r655": "/m/01g317",  # Girl → Person
    "/m/01bl7v": "/m/01g317",  # Boy → Person
    "/m/0cnyhnx": "/m/01xq0k1",  # Bull → Cattle
    "/m/01226z": "/m/018xm",  # Football → Ball
    "/m/05ctyq": "/m/018xm",  # Tennis ball → Ball
    "/m/058qzx": "/m/04ctx",  # Kitchen knife → Knife
    "/m/06pcq": "/m/0l515",  # Submarine sandwich → Sandwich
    "/m/03m3pdh": "/m/02crq1",  # Sofa bed → Couch
    "/m/046dlr": "/m/01x3z",  # Alarm clock → Clock
    "/m/0h8mzrc": "/m/01x3z",  # Wall clock → Clock
}
