# For a pyramid with strides 8 to 64: everything that is sized in strides moves up one level.
_base_ = './faster_rcnn_fpn.py'
roi_extractor = dict(
    featmap_strides=[8, 16, 32, 64],
    finest_scale=112,  # 56 x 2: RoIs cover as many cells of their level as with strides 4 to 32
)
model = dict(
    data_preprocessor=dict(pad_size_divisor=64),
    rpn_head=dict(
        anchor_generator=dict(
            scales=[4],  # x strides = anchors of 32 to 512 pixels, as scale 8 with strides 4 to 64
            strides=[8, 16, 32, 64, 128],  # the backbone's four, and FPN's extra level
        ),
    ),
    roi_head=dict(bbox_roi_extractor=roi_extractor),
)
