# The TRM of config/trm.py on photographs, four to a picture, which a network of timm looks at. The data:
# python data.py mosaics --source=FOLDER_OF_CLASS_FOLDERS --out=data/mosaics
out_dir = 'out/mosaics'
dataset = 'data/mosaics'
encoder = 'timm/tf_efficientnet_lite0'   # @FILE behind it takes weights from a file
fit = 'squash'                           # all of the picture; timm's own way cuts off its edges
inner_steps = 2
recall = False
n_kv_head = 1
max_steps = 2000
eval_interval = 500
