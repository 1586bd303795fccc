import tensorflow as tf  # 1.15


def layer(name, x, size):
    shape = [x.shape[1], size]
    with tf.variable_scope(name):
        kernel = tf.get_variable("kernel", shape)
        bias = tf.get_variable("bias", [size])
    return tf.matmul(x, kernel) + bias


def average(name, value, start):
    # What a BatchNorm keeps for later use.
    kept = tf.Variable(start, trainable=False, name=name)
    return tf.assign_sub(kept, 0.1 * (kept - value))


def loss_of(x, y, weight):
    hidden = tf.tanh(layer("dense1", x, 7))
    predicted = layer("dense2", hidden, 3)
    loss = weight * tf.reduce_mean((predicted - y) ** 2)
    mean, variance = tf.nn.moments(hidden, [0])
    return loss, [
        average("mean", mean, tf.zeros([7])),
        average("variance", variance, tf.ones([7])),
    ]


def decay(rate, step):
    fn = tf.train.exponential_decay
    return fn(rate, step, decay_steps=6, decay_rate=0.7)


def train(batches, logdir):
    x = tf.placeholder(tf.float32, [None, 5])
    y = tf.placeholder(tf.float32, [None, 3])
    weight = tf.placeholder(tf.float32, [])
    loss, update_ops = loss_of(x, y, weight)
    trained = {
        variable.op.name: variable
        for variable in tf.trainable_variables()
        if variable.op.name != "dense1/bias"
    }
    step = tf.train.get_or_create_global_step()

    train_op = tf.contrib.layers.optimize_loss(
        loss,
        step,
        learning_rate=0.02,
        optimizer="Adam",
        gradient_multipliers={
            "dense1/kernel:0": 0.1,
            "dense2/bias:0": 3.0,
        },
        clip_gradients=5.0,
        learning_rate_decay_fn=decay,
        update_ops=update_ops,
        variables=list(trained.values()),
        summaries=[
            "loss",
            "learning_rate",
            "global_gradient_norm",
        ],
    )

    merged = tf.summary.merge_all()
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        writer = tf.summary.FileWriter(logdir)
        for number, (xs, ys, ws) in enumerate(batches):
            feed = {x: xs, y: ys, weight: ws}
            _, now = session.run([train_op, merged], feed)
            writer.add_summary(now, number)
        writer.close()
        return session.run(trained)
