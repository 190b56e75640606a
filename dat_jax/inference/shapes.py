"""Shapes of the arrays that hold images of any size, so that few programs are compiled."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from dat_jax.data.buckets import (
    Shape,
    check_sizes,
    choose_buckets,
    find_bucket,
    ladder_bucket,
    pad_view,
    pad_views,
    parse_buckets,
    plan_shapes,
)
from dat_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ArrayShapes:
    """Chooses the shape of the array for each view of an image. The choice changes no result, except for rounding.

    Attributes:
      choice: "auto": the planned shapes, and for other images sides of a ladder, each a quarter longer than the one before it.
        "exact": the size of the image. Or buckets in pixels of the resized image, such as "512x704,704x512".
      planned: (height, width) of an image -> shapes of the arrays of its views.

    Raises:
      UserError: ``choice`` is none of these.
    """

    choice: str = "auto"
    planned: Mapping[Shape, tuple[Shape, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.choice, str):
            raise UserError(
                f'buckets: expected "auto", "exact" or shapes such as "608x832,832x608", got {self.choice!r}.'
            )
        if self.choice not in ("auto", "exact"):
            parse_buckets(self.choice)

    def plan(self, transform: Any, sizes: Iterable[Shape]) -> "ArrayShapes":
        """Return the choice for images of known sizes: the fewest shapes that waste at most 12 % of their pixels.

        Args:
          transform: function with ``view_shapes(height, width)``.
          sizes: (height, width) of the images.

        Raises:
          UserError: see ``buckets.check_sizes``.
        """
        sizes = check_sizes(sizes)
        if self.choice != "auto":
            return self
        views = {size: transform.view_shapes(*size) for size in set(sizes)}
        buckets = choose_buckets([views[size][0] for size in sizes])
        return dataclasses.replace(self, planned=plan_shapes(views, buckets))

    def choose(self, transform: Any, size: Shape) -> tuple[Shape, ...] | None:
        """Return the shape of the array of each view of an image of (height, width); None if they are the views' own.

        Raises:
          UserError: none of the given buckets holds the image.
        """
        views = transform.view_shapes(*size)
        if self.choice == "exact":
            return None
        if self.choice != "auto":
            buckets = parse_buckets(self.choice)
            return tuple(find_bucket(view, buckets) for view in views)
        shapes = self.planned.get(size) or tuple(map(ladder_bucket, views))
        return None if shapes == views else shapes

    def pad(self, record: dict[str, Any], transform: Any, size: Shape) -> dict[str, Any]:
        """Return a record of a segmentor ("view_0", ...) or detector ("image") with its views in arrays of the chosen shapes.

        Their sizes are added: "size_of_view_0", ... for a segmentor, "sizes" for a detector.
        """
        shapes = self.choose(transform, size)
        if shapes is None:
            return record
        if "image" in record:
            padded = pad_view(record["image"], shapes[0], name="image")
            return {**record, "image": padded["image"], "sizes": padded["size_of_image"]}
        return pad_views(record, shapes)
