"""A dataset mapper that names the image it cannot use."""

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError

from ..errors import InputError, one_line
from .image_files import fault_of_image

__all__ = ["CheckedMapper", "first_sentence"]


class CheckedMapper:
    """Calls a mapper. If the mapper fails because of the image, the error says which image and why.

    An image is at fault if it cannot be read to its end, or if its size is not the annotated one.
    Every other failure of the mapper is passed on as it is. A mapper of another kind than
    detectron2's may read files that Pillow cannot, so of its failures only those are looked into
    that come from reading a file.
    """

    def __init__(self, mapper):
        """
        Args:
            mapper (callable): takes a dataset dict, for example a detectron2 `DatasetMapper`.
        """
        self.mapper = mapper

    def __call__(self, dataset_dict):
        """
        Args:
            dataset_dict (dict): one image of a dataset in detectron2's format.

        Returns:
            what the mapper returns.

        Raises:
            InputError: the image is missing, damaged, too narrow to be resized, or not of the
                annotated size; its masks do not fit INPUT.MASK_FORMAT; or the mapper returned None.
        """
        try:
            sample = self.mapper(dataset_dict)
        except Exception as error:
            # Looked for after the failure, so that sound images are read only once.
            sentence = "file_name" in dataset_dict and (
                self._fault_of_image(dataset_dict, error)
                or self._fault_of_masks(dataset_dict)
                or self._fault_of_shape(dataset_dict, error)
            )
            if not sentence:
                raise
            raise InputError(sentence) from error
        if sample is None:
            raise InputError(
                f"The mapper returned None for image {dataset_dict.get('file_name')}: leave such "
                "images out of the dataset, since a run that is resumed counts one sample for every image."
            )
        return sample

    def _fault_of_image(self, dataset_dict, error):
        is_detectron2s = getattr(type(self.mapper), "__call__", None) is DatasetMapper.__call__
        if not is_detectron2s and not isinstance(error, (OSError, SyntaxError, SizeMismatchError)):
            return None
        size = dataset_dict.get("width"), dataset_dict.get("height")
        return fault_of_image(dataset_dict["file_name"], None if None in size else size)

    def _fault_of_masks(self, dataset_dict):
        wants_polygons = (
            getattr(self.mapper, "is_train", False)
            and getattr(self.mapper, "use_instance_mask", False)
            and getattr(self.mapper, "instance_mask_format", None) == "polygon"
        )
        has_rle = any(
            isinstance(annotation.get("segmentation"), dict)
            for annotation in dataset_dict.get("annotations", ())
            if not annotation.get("iscrowd", 0)
        )
        if wants_polygons and has_rle:
            return (
                f"Image {dataset_dict['file_name']} of the dataset has masks that are not "
                'polygons: set INPUT.MASK_FORMAT to "bitmask".'
            )
        return None

    @staticmethod
    def _fault_of_shape(dataset_dict, error):
        sides = sorted((dataset_dict.get("width", 0), dataset_dict.get("height", 0)))
        if isinstance(error, ValueError) and sides[1] > 100 * sides[0] > 0:
            return (
                f"Image {dataset_dict['file_name']} of the dataset, with sides of {sides[0]} and "
                f"{sides[1]} pixels, cannot be resized ({one_line(error)}): crop it, or remove it from "
                "the annotations."
            )
        return None


def first_sentence(error):
    """Gives the sentence of an InputError, even if it comes from a worker process.

    When a torch DataLoader raises the error of a worker again, the message holds the worker's whole
    traceback.

    Args:
        error (InputError): the error as it was caught.

    Returns:
        str: one line without a traceback.
    """
    text = str(error).strip()
    if "Traceback (most recent call last):" not in text:
        return text
    # The last line of a traceback is the name of the class, a colon and the original message.
    return text.splitlines()[-1].partition(f"{type(error).__name__}: ")[2]
